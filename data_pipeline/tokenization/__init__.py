"""The parts of `data_pipeline.tokenize`: encoders, workers, files, journal, progress."""
