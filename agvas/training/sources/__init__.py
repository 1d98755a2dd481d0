"""Readers of published data sets: from files to records, and from records to the samples training sees. No torch here."""
