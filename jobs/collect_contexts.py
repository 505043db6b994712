"""The command `sarm collect-contexts` as a script, which a cluster can be given. `sarm.commands.collect_contexts` says what it does, with examples."""

from sarm.commands.collect_contexts import COMMAND

if __name__ == "__main__":
    COMMAND.run()
