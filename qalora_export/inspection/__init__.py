"""What an artifact holds, and how two of them differ, whatever their formats."""
