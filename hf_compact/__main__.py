"""`python -m hf_compact` is `hf-compact`."""

from .cli import main

main()
