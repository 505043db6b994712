"""The command `sarm evaluate` as a script, which a cluster can be given. `sarm.commands.evaluate` says what it does, with examples."""

from sarm.commands.command import command_of

if __name__ == "__main__":
    command_of("evaluate").run()
