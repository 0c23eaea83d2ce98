"""What people look at: tables in the terminal and a report in one HTML file, made from the files of a run."""
