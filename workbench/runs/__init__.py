"""Running lanes: events, comparison, control."""
