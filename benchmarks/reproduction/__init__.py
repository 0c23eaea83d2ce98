"""What papers claim of their methods, looked at again on data that needs no download: see ``__main__``."""
