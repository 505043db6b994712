"""`python -m sarm.commands`: the command `sarm` where no script of it is installed."""

from sarm.commands.program import main

if __name__ == "__main__":
    main()
