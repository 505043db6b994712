"""The command `sarm prepare-data` as a script, which a cluster can be given. `sarm.commands.prepare_data` says what it does, with examples."""

from sarm.commands.command import command_of

if __name__ == "__main__":
    command_of("prepare_data").run()
