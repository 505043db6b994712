"""The command `sarm serve` as a script, which a cluster can be given. `sarm.commands.serve` says what it does, with examples."""

from sarm.commands.serve import COMMAND

if __name__ == "__main__":
    COMMAND.run()
