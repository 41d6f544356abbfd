"""Recordings: hours of video cut into chunks as they arrive, each encoded once, asked about for days; and the jobs that
do it, which survive any kill."""
