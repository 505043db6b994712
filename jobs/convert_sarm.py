"""The command `sarm convert-sarm` as a script, which a cluster can be given. `sarm.commands.convert_sarm` says what it does, with examples."""

from sarm.commands.convert_sarm import COMMAND

if __name__ == "__main__":
    COMMAND.run()
