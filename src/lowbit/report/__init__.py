"""Stage 9: `lowbit-report.json` and the page that shows it."""
