"""The command `sarm relabel` as a script, which a cluster can be given. `sarm.commands.relabel` says what it does, with examples."""

from sarm.commands.relabel import COMMAND

if __name__ == "__main__":
    COMMAND.run()
