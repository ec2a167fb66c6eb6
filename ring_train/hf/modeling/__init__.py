"""Files that travel inside an exported folder; nothing of ring_train imports them."""
