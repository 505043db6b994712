"""The command `sarm ablation` as a script, which a cluster can be given. `sarm.commands.ablation` says what it does, with examples."""

from sarm.commands.ablation import COMMAND

if __name__ == "__main__":
    COMMAND.run()
