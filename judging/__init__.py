"""What videos are judged by: numbers of sets of clips, the papers' protocols for folders, people's choices."""
