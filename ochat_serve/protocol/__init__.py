"""The wire shapes of the API.  Shapes only: what a field means is decided in the use cases."""
