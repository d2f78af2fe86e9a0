"""From records to statistics, tables, figures and the summary. Never loads a model."""
