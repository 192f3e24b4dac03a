"""`octavo report`: results files, read in one form, as tables and as one page with plots."""
