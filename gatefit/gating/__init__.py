"""Gates: inserted, proved, costed, set from data, saved and loaded."""
