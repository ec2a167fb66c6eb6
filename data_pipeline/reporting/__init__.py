"""The page about data: `records` reads, `figures` draws, `page` writes HTML."""
