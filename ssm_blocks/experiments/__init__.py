"""The state-space experiments, each one a command: `python -m ssm_blocks.experiments NAME`."""
