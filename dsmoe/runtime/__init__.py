"""Process life: the launcher's variables, joining and leaving, watchdog, failure reports, atomic files."""
