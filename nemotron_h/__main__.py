"""`python -m nemotron_h`: the same as the command `nemotron-h`."""

from .cli import main

if __name__ == "__main__":
    main()
