"""The command `sarm card` as a script, which a cluster can be given. `sarm.commands.reward_card` says what it does, with examples."""

from sarm.commands.reward_card import COMMAND

if __name__ == "__main__":
    COMMAND.run()
