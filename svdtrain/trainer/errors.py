"""Errors that end a run on purpose. Imports nothing, so that the command line can name them without torch."""


class RankLostError(RuntimeError):
    """A collective failed: another rank died, hung beyond the time limit, or never came."""


class Preempted(Exception):
    """A signal on any rank ended an evaluation early; raised on every rank at the same batch."""
