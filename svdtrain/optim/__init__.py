"""MuonAdamW, its parameter groups and the schedules."""
