"""Clients of a reward server. They need neither torch nor a model: `from sarm.client import RewardClient`."""

from sarm.client.http import RewardClient as RewardClient
from sarm.client.rewards import Answer as Answer
from sarm.client.rewards import RewardError as RewardError
from sarm.client.rewards import Rewards as Rewards
