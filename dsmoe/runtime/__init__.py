"""Process life: what the launcher says, joining and leaving, the watchdog, failure reports, files written whole."""
