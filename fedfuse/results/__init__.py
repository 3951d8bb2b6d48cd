"""What a run left, read: statistics, figures, tables, the report, the live page.

It reads run directories alone, and may import `config`, `files` and `errors`: never what wrote them.
"""
