"""Tables, verdicts and the report page."""
