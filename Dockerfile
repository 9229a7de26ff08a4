# The server in a container: for NVIDIA GPUs by default, without a GPU by
#   docker build --build-arg BACKEND=cpu .
# vLLM's wheels bring CUDA's libraries along; the host brings the driver.
FROM python:3.12-slim-bookworm
ARG BACKEND=gpu
# Where pip finds PyTorch's CPU wheels, if BACKEND=cpu and pip is not set up for it otherwise.
ARG PIP_EXTRA_INDEX_URL=""
# libnuma1: vLLM's CPU build; gcc: Triton compiles its launchers on the GPU.
RUN apt-get update \
    && apt-get install -y --no-install-recommends libnuma1 gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 ochat \
    && install -d -o ochat /app /cache
USER ochat
WORKDIR /app
# The packages first: they change less often than the code.
COPY --chown=ochat requirements/${BACKEND}.lock requirements/
RUN python -m venv .venv \
    && .venv/bin/python -m pip install --no-cache-dir --no-deps -r requirements/${BACKEND}.lock
COPY --chown=ochat pyproject.toml README.md ./
COPY --chown=ochat ochat_serve ochat_serve
COPY --chown=ochat configs configs
RUN .venv/bin/python -m pip install --no-cache-dir --no-deps --no-build-isolation .

ENV PATH=/app/.venv/bin:$PATH HF_HOME=/cache/huggingface OCHAT_CACHE=/cache/ochat_serve \
    XDG_STATE_HOME=/cache/state
VOLUME /cache
EXPOSE 18888
# Alive is enough here: loading a model takes minutes and is no illness. HTTPS is for whoever
# passes certificates; here it is this machine that is asked, whatever its name.
HEALTHCHECK --interval=15s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import ssl, urllib.request as r\ntry: r.urlopen('http://127.0.0.1:18888/livez', timeout=2)\nexcept OSError: r.urlopen('https://127.0.0.1:18888/livez', timeout=2, context=ssl._create_unverified_context())"]
# Exec form: signals reach the server itself, so `docker stop` ends it cleanly.
ENTRYPOINT ["python", "-m", "ochat_serve.openai_api_server", "--host", "0.0.0.0"]
