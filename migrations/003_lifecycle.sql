-- What the whole life of a row needs: batches of rows that are read from the
-- table, a quick way to failed rows, and the functions that retry them.
-- Only up; it can be run twice, and by psql alone.

-- +goose Up

-- +goose StatementBegin
alter table outbox_relay_checkpoints
    add column if not exists backfill_snapshot pg_snapshot null,
    add column if not exists backfilled        bigint not null default 0,
    drop constraint if exists outbox_relay_checkpoints_phase_check,
    add constraint outbox_relay_checkpoints_phase_check check (phase in ('creating', 'backfilling', 'streaming'));

comment on column outbox_relay_checkpoints.phase is
    'creating: the slot is about to be made; backfilling: it exists, and rows from before it are published; streaming: events flow from it';
comment on column outbox_relay_checkpoints.backfill_snapshot is
    'while not streaming: what it sees comes from the table, the rest through the slot';
comment on column outbox_relay_checkpoints.backfilled is
    'rows that the present or last backfill has published or parked';

create table if not exists outbox_relay_batches
(
    slot        text        not null,
    kind        text        not null,
    run         text        null,
    ids         text[]      not null,
    done        int         not null default 0,
    commit_lsn  pg_lsn      not null,
    ordinal     bigint      not null,
    recorded_at timestamptz not null default now(),
    constraint outbox_relay_batches_primary_key primary key (slot),
    constraint outbox_relay_batches_kind_check check (kind in ('backfill', 'retry', 'replay'))
) with (fillfactor = 50);

comment on table outbox_relay_batches is
    'Rows that a relay publishes from the table and not from its slot; at most one batch a slot. Recorded before any of them is sent.';
comment on column outbox_relay_batches.run is
    'the name of a replay''s run: part of its messages'' ids';
comment on column outbox_relay_batches.ids is
    'the rows'' ids, in the order in which they are published';
comment on column outbox_relay_batches.done is
    'how many of them, from the front, have an outcome that is recorded';
comment on column outbox_relay_batches.commit_lsn is
    'with ordinal: the position of the checkpoint once all have an outcome';
-- +goose StatementEnd

-- It finds failed rows. Neither its key nor its predicate names status, so that
-- marking a row published stays HOT. Building it holds writers up for as long as
-- the table takes to be read: where that is too long, make it beforehand with
-- CREATE INDEX CONCURRENTLY under this name.
-- +goose StatementBegin
create index if not exists events_failed_at_index on events (failed_at) where failed_at is not null;
-- +goose StatementEnd

-- outbox_retry puts failed rows back to pending and asks the relay, by
-- transactional logical messages of at most 1000 rows each, to publish them once
-- this transaction has committed. It returns how many: what is not failed, or not
-- there, is passed over. outbox_retry_all does so with all that the relay has
-- parked. failed_at and failed_reasons stay as they are, to tell what happened.
--
-- Both work as the caller, who needs SELECT and UPDATE (status, retried_at,
-- retried_attempts) on the table. They find it in the schema that it has now,
-- whatever the caller's search_path, and under its name, so that it can be
-- replaced by another. Rows are locked in the order of their ids: two of them
-- never deadlock.
-- +goose StatementBegin
do $do$
begin
perform set_config('search_path', format('%I, pg_temp', nspname), true)
from pg_class join pg_namespace on pg_namespace.oid = relnamespace
where pg_class.oid = 'events'::regclass;

create or replace function outbox_retry(variadic ids text[]) returns bigint as $$
    with failed as materialized (
        select id
        from events
        where id = any (ids) and status = 'failed'
        order by id
        for no key update
    ), retried as (
        update events
        set status = 'pending', retried_at = now(), retried_attempts = retried_attempts + 1
        from failed
        where events.id = failed.id and status = 'failed'
        returning events.id, retried_attempts
    ), numbered as (
        select id, retried_attempts as attempt, (row_number() over (order by id) - 1) / 1000 as message
        from retried
    ), emitted as materialized (
        select count(*) as rows,
               pg_logical_emit_message(true, 'outbox_relay:' || 'events'::regclass::oid, json_build_object(
                   'retry', json_agg(json_build_object('id', id, 'attempt', attempt) order by id))::text) as lsn
        from numbered
        group by message
        order by message
    )
    select coalesce(sum(rows), 0)::bigint from emitted where lsn is not null; -- reads lsn, so that it is emitted
$$ language sql volatile set search_path from current;

create or replace function outbox_retry_all() returns bigint as $$
    select outbox_retry(variadic array(select id from events where failed_at is not null and status = 'failed'));
$$ language sql volatile set search_path from current;

comment on function outbox_retry(text[]) is
    'puts these rows, where they failed, back to pending, and has the relay publish them again; returns how many';
comment on function outbox_retry_all() is
    'the same for every row that the relay has parked';
end;
$do$;
-- +goose StatementEnd
