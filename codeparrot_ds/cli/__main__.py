"""Entry point of `python -m codeparrot_ds.cli`."""

from codeparrot_ds.cli import main

main()
