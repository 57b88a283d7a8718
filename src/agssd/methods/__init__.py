"""One pretraining recipe per file, and what recipes share."""
