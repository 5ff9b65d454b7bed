"""`python -m backboned.server.commands`: the command line of this very Python."""

from backboned.server.commands import main

if __name__ == "__main__":
    main()
