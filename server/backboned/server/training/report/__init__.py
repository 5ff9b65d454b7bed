"""The report of a version: one page that tells how good it is, and shows where it errs."""
