"""The database's history: one file a step under `versions`, each the next one's ground."""
