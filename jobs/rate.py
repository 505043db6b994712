"""The command `sarm rate` as a script, which a cluster can be given. `sarm.commands.rate` says what it does, with examples."""

from sarm.commands.command import command_of

if __name__ == "__main__":
    command_of("rate").run()
