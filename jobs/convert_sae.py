"""The command `sarm convert-sae` as a script, which a cluster can be given. `sarm.commands.convert_sae` says what it does, with examples."""

from sarm.commands.convert_sae import COMMAND

if __name__ == "__main__":
    COMMAND.run()
