-- What the relay adds to the outbox: two columns that the message can carry,
-- room for HOT updates, the publication, and its own tables.
-- Only up; it can be run twice, and by psql alone.

-- +goose Up

-- +goose StatementBegin
alter table events
    add column if not exists aggregate_id text,
    add column if not exists headers      jsonb;

comment on column events.aggregate_id is 'what the event is about; consumers order and group by it';
comment on column events.headers is 'an object of strings: further headers of the message, such as traceparent';
-- +goose StatementEnd

-- With half of each page free, marking a row published stays on its page (HOT).
-- A partitioned table has no pages of its own: set it on the partitions.
-- A fillfactor that was chosen before is kept.
-- +goose StatementBegin
do $do$
begin
    if exists (select
               from pg_class
               where oid = 'events'::regclass and relkind = 'r'
                 and not exists (select from unnest(reloptions) as option where option like 'fillfactor=%'))
    then
        alter table events set (fillfactor = 50);
    end if;
end;
$do$;
-- +goose StatementEnd

-- +goose StatementBegin
create table if not exists outbox_relay_checkpoints
(
    slot              text        not null,
    format            int         not null default 1,
    epoch             bigint      not null default 0,
    phase             text        not null default 'creating',
    system_identifier text        not null,
    timeline          int         not null,
    commit_lsn        pg_lsn      not null,
    ordinal           bigint      not null,
    confirmed_lsn     pg_lsn      not null,
    stream            text        not null,
    stream_created_at timestamptz not null,
    stream_sequence   bigint      not null,
    message_id        text        null,
    unrecorded_bound  int         not null,
    foreign_seen      boolean     not null default false,
    publication_state text        null,
    updated_at        timestamptz not null default now(),
    constraint outbox_relay_checkpoints_primary_key primary key (slot),
    constraint outbox_relay_checkpoints_phase_check check (phase in ('creating', 'streaming'))
) with (fillfactor = 50);

comment on table outbox_relay_checkpoints is
    'How far each relay has come; one row a slot. Written by the relay only, in one transaction with the outcomes it records.';
comment on column outbox_relay_checkpoints.format is
    'version of what this row means';
comment on column outbox_relay_checkpoints.epoch is
    'counted up by each connection that takes over; an older one records nothing more';
comment on column outbox_relay_checkpoints.phase is
    'creating: the slot is about to be made; streaming: it exists';
comment on column outbox_relay_checkpoints.system_identifier is
    'the cluster that the positions belong to, from pg_control_system()';
comment on column outbox_relay_checkpoints.timeline is
    'the timeline that the positions belong to';
comment on column outbox_relay_checkpoints.commit_lsn is
    'with ordinal: the position up to which every event is stored in the stream or parked as failed';
comment on column outbox_relay_checkpoints.ordinal is
    'the event''s number in the transaction that commits at commit_lsn, from 1';
comment on column outbox_relay_checkpoints.confirmed_lsn is
    'the highest LSN ever confirmed to the slot; written before it is confirmed';
comment on column outbox_relay_checkpoints.stream_created_at is
    'tells the stream from another one that was made later under its name';
comment on column outbox_relay_checkpoints.stream_sequence is
    'the stream''s sequence at exactly the position (commit_lsn, ordinal)';
comment on column outbox_relay_checkpoints.message_id is
    'Nats-Msg-Id of the message at stream_sequence; null where that message is not ours';
comment on column outbox_relay_checkpoints.unrecorded_bound is
    'how many events may be stored in the stream without being recorded here';
comment on column outbox_relay_checkpoints.foreign_seen is
    'whether a message that is not ours was ever seen in the stream';
comment on column outbox_relay_checkpoints.publication_state is
    'fingerprint of the publication; the relay stops when it changes; set it to null to accept the change';

create table if not exists outbox_relay_history
(
    slot            text        not null,
    commit_lsn      pg_lsn      not null,
    ordinal         bigint      not null,
    confirmed_lsn   pg_lsn      not null,
    stream_sequence bigint      not null,
    message_id      text        null,
    recorded_at     timestamptz not null default now()
);

comment on table outbox_relay_history is
    'Older checkpoints, kept while the slot is held back (OUTBOX_CONFIRM_DELAY): what the relay goes back to when the broker has forgotten messages.';

create table if not exists outbox_relay_leftovers
(
    slot        text        not null,
    id          text        not null,
    outcome     text        not null,
    reason      text        null,
    event       jsonb       null,
    waiting     boolean     not null default true,
    recorded_at timestamptz not null default now(),
    constraint outbox_relay_leftovers_primary_key primary key (slot, id),
    constraint outbox_relay_leftovers_outcome_check check (outcome in ('published', 'failed'))
);

comment on table outbox_relay_leftovers is
    'Outcomes of events whose row was locked by the application, to be written to it later; and rejected events whose row is gone.';
comment on column outbox_relay_leftovers.id is
    'the event''s id';
comment on column outbox_relay_leftovers.reason is
    'why a failed event was rejected';
comment on column outbox_relay_leftovers.event is
    'a rejected event, kept whole in case its row goes';
comment on column outbox_relay_leftovers.waiting is
    'whether the outcome is still to be written to the row; false: the row is gone, and this is what is left of the event';
-- +goose StatementEnd

-- outbox_relay_publication_state is the fingerprint in the checkpoint: null where
-- the publication does not publish the table, else a text that changes whenever
-- inserts may have been passed over.
-- THE ONE PLACE that defines the fingerprint.
-- +goose StatementBegin
create or replace function outbox_relay_publication_state(publication name, outbox regclass) returns text as $$
    select concat_ws(' ', p.oid, p.xmin, r.oid, r.xmin, r.prrelid)
    from pg_publication as p
    join pg_publication_rel as r on r.prpubid = p.oid
    where p.pubname = publication and r.prrelid = outbox;
$$ language sql stable;
-- +goose StatementEnd

-- outbox_relay_publish makes the publication publish the outbox, with these
-- columns at least. It changes nothing that already does: the relay takes any
-- change of the publication's rows for a gap. What it has to change it changes in
-- one statement, keeps further columns and tables, and carries the fingerprint of
-- every checkpoint that held the old one, so that a running relay goes on.
-- It has to be called by the owner of table and publication.
-- +goose StatementBegin
create or replace function outbox_relay_publish(publication name, outbox regclass, columns text[]) returns void as $$
declare
    published pg_publication;
    entry     pg_publication_rel;
    listed    text[];
    before    text;
    objects   text;
    list      text := (select string_agg(quote_ident(name), ', ' order by n)
                       from unnest(columns) with ordinality as c (name, n));
begin
    select * into published from pg_publication where pubname = publication;
    if not found then
        execute format('create publication %I for table only %s (%s)'
                       ' with (publish = ''insert'', publish_via_partition_root = true)',
                       publication, outbox, list);
        return;
    end if;

    select * into entry from pg_publication_rel where prpubid = published.oid and prrelid = outbox;
    if not found then
        if published.puballtables
            or exists (select
                       from pg_publication_namespace
                       join pg_class on pg_class.relnamespace = pnnspid
                       where pnpubid = published.oid and pg_class.oid = outbox)
        then
            return; -- every column of it
        end if;
        execute format('alter publication %I add table only %s (%s)', publication, outbox, list);
        return;
    end if;

    if entry.prqual is not null then
        raise exception 'publication % has a row filter for %: the relay would pass events over', quote_ident(publication), outbox
            using errcode = 'object_not_in_prerequisite_state',
                  hint = format('Take it out: ALTER PUBLICATION %I SET TABLE %s (%s)', publication, outbox, list);
    end if;
    if entry.prattrs is null then
        return; -- every column of it
    end if;
    select array_agg(attname::text order by attnum) into listed
    from pg_attribute
    where attrelid = outbox and attnum = any (entry.prattrs::int2[]);
    if listed @> columns then
        return;
    end if;

    -- SET TABLE leaves alone what it names unchanged, and drops what it does not.
    select string_agg(
               format('table only %s%s%s', r.prrelid::regclass,
                      ' (' || (select string_agg(quote_ident(attname), ', ' order by attnum)
                                        from pg_attribute
                                        where attrelid = r.prrelid and attnum = any (r.prattrs::int2[]))
                           || coalesce((select string_agg(', ' || quote_ident(name), '' order by n)
                                        from unnest(columns) with ordinality as c (name, n)
                                        where r.oid = entry.oid and name <> all (listed)), '') || ')',
                      ' where (' || pg_get_expr(r.prqual, r.prrelid) || ')'),
               ', ')
    into objects
    from pg_publication_rel as r
    where r.prpubid = published.oid;
    before := outbox_relay_publication_state(publication, outbox);
    execute format('alter publication %I set %s', publication, objects);
    update outbox_relay_checkpoints
    set publication_state = outbox_relay_publication_state(publication, outbox)
    where publication_state = before;
end;
$$ language plpgsql;

select outbox_relay_publish('outbox_relay', 'events', array[
    'id', 'version', 'aggregate_type', 'aggregate_id', 'event_type', 'payload', 'headers', 'status', 'created_at']);
-- +goose StatementEnd
