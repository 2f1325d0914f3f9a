-- Why Postgres refuses to change a row, where it does: its outcome waits in the
-- leftovers, and the rows beside it go on.
-- Only up; it can be run twice, and by psql alone.

-- +goose Up

-- +goose StatementBegin
alter table outbox_relay_leftovers
    add column if not exists refused    text        null,
    add column if not exists refused_at timestamptz null;

comment on table outbox_relay_leftovers is
    'Outcomes of events that their rows do not have yet, since the application holds them locked, or Postgres refuses to change them; and rejected events whose row is gone.';
comment on column outbox_relay_leftovers.refused is
    'why Postgres refused to write the outcome to the row at the last attempt; null: it did not';
-- +goose StatementEnd
