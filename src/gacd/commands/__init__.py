"""What each command does, one file a command: stages, each resumable, none done twice."""
