"""The command `sarm collect-contexts` as a script, which a cluster can be given. `sarm.commands.collect_contexts` says what it does, with examples."""

from sarm.commands.command import command_of

if __name__ == "__main__":
    command_of("collect_contexts").run()
