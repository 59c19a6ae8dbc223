"""`python -m upswap`, for where the script is not on the path."""

from .apps.cli import main

if __name__ == "__main__":
    main()
