"""The most that one request may hold, and why that number.

More is a 400 that names the field and both numbers, before any text is encoded.  Where OpenAI has
a number, it is OpenAI's; the others leave room for every honest request and keep what a hostile
one costs to some milliseconds.  ``docs/security.md`` has the same table.
"""

MAX_MESSAGES = 2_048  # each is a few tokens at least, so that more hardly fit any context
MAX_PARTS = 1_024  # of one message; they become one text
MAX_STOP = 4  # OpenAI's
MAX_STOP_CHARS = 1_000  # the engine looks for each in every new piece of text
MAX_STOP_TOKEN_IDS = 64  # compared with every token; vocabularies have some ten that end a text
MAX_PROMPTS = 16  # of a completion request; each is a request of its own to the engine
MAX_LOGPROBS = 5  # of a completion request: OpenAI's
MAX_LOGIT_BIAS = 300  # OpenAI's
MAX_TOP_LOGPROBS = 20  # OpenAI's; each is a word for every token of the answer
MAX_TOOLS = 128  # OpenAI's; they are not served, and must not cost either
MAX_METADATA = 16  # OpenAI's, as the next two; all of it goes into the log
MAX_METADATA_NAME_CHARS = 64
MAX_METADATA_CHARS = 512
MAX_USER_CHARS = 512  # goes into the log
MAX_SAFETY_IDENTIFIER_CHARS = 128  # OpenAI's
MAX_MODEL_CHARS = 1_024  # a path can be the name of a model
MAX_CONDITION_CHARS = 64  # stands in every turn of the prompt
MAX_UNKNOWN_FIELDS = 128  # different names, at all levels together; their names are sorted

# What an answer must look like.  What compiling and using it costs is bounded where it is tried.
MAX_SCHEMA_CHARS = 131_072  # OpenAI allows 120,000 in names and values
MAX_SCHEMA_NAME_CHARS = 64  # OpenAI's
MAX_DESCRIPTION_CHARS = 4_096  # for the model, which is not told of it
MAX_REGEX_CHARS = 4_096
MAX_GRAMMAR_CHARS = 32_768
MAX_CHOICES = 1_000  # OpenAI's for the values of an enum
