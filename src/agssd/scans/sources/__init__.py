"""From what the user names (files, folders, manifests, names of public sets) to jobs, one per case."""
