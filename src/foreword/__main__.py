"""`python -m foreword` is the command `foreword`."""

from foreword.cli import main

if __name__ == "__main__":
    main()
