-- What the whole life of a row needs: batches of rows that are read from the
-- table, a quick way to failed rows, functions that retry them, and partitions that
-- come and go.
-- Only up; it can be run twice, and by psql alone.

-- +goose Up

-- +goose StatementBegin
alter table outbox_relay_checkpoints
    add column if not exists backfilled bigint not null default 0,
    drop constraint if exists outbox_relay_checkpoints_phase_check,
    add constraint outbox_relay_checkpoints_phase_check check (phase in ('creating', 'backfilling', 'streaming'));

comment on column outbox_relay_checkpoints.phase is
    'creating: the slot is about to be made; backfilling: it exists, and rows from before it are published; streaming: events flow from it';
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
        select events.id::text as id
        from events
        where events.id::text = any (ids) and status = 'failed'
        order by events.id::text
        for no key update
    ), retried as (
        update events
        set status = 'pending', retried_at = now(), retried_attempts = retried_attempts + 1
        from failed
        where events.id::text = failed.id and status = 'failed'
        returning failed.id, retried_attempts
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
    select outbox_retry(variadic array(select events.id::text from events where failed_at is not null and status = 'failed'));
$$ language sql volatile set search_path from current;

comment on function outbox_retry(text[]) is
    'puts these rows, where they failed, back to pending, and has the relay publish them again; returns how many';
comment on function outbox_retry_all() is
    'the same for every row that the relay has parked';
end;
$do$;
-- +goose StatementEnd

-- outbox_relay_check_partition_key raises object_not_in_prerequisite_state where
-- the outbox is partitioned by a column that the relay updates, at any level. The
-- update of such a column can move the row into another partition, which is an
-- insert: the relay would publish the event again.
-- +goose StatementBegin
create or replace function outbox_relay_check_partition_key(outbox regclass) returns void as $$
declare
    key text := (select string_agg(distinct attname::text, ', ')
                 from pg_partition_tree(outbox) as part
                 join pg_depend as d on d.classid = 'pg_class'::regclass and d.objid = part.relid
                     and d.refclassid = 'pg_class'::regclass and d.refobjid = part.relid and d.refobjsubid = 0
                     and d.deptype = 'i' -- a column of the key, by itself or within an expression
                 join pg_attribute on attrelid = part.relid and attnum = d.objsubid
                 where not part.isleaf
                   and attname in ('status', 'published_at', 'failed_at', 'failed_reasons', 'failed_attempts',
                                   'retried_at', 'retried_attempts'));
begin
    if key is not null then
        raise exception 'table % is partitioned by %, which the relay updates: a row that moves to another partition would be published again', outbox, key
            using errcode = 'object_not_in_prerequisite_state',
                  hint = 'Partition it by a column that nobody updates, such as created_at.';
    end if;
end;
$$ language plpgsql stable;

select outbox_relay_check_partition_key('events');
-- +goose StatementEnd

-- outbox_relay_add_partitions makes the partitions of an outbox for the present
-- day, week or month (by UTC) and for as many of them ahead, where there are none
-- yet, and returns the names of the new ones. It has to be called by the outbox's
-- owner. Where the default partition has rows of such a time already, there can
-- be no partition for it: a notice says so. It gives up when it must wait for a
-- lock for more than a second, since inserts wait behind it.
-- +goose StatementBegin
create or replace function outbox_relay_add_partitions(outbox regclass, unit text, ahead int) returns setof text as $$
declare
    root  pg_class;
    home  name;
    since timestamptz;
    part  name;
begin
    if unit is null or unit not in ('day', 'week', 'month') or ahead is null or ahead < 0 then
        raise exception 'cannot add partitions for % and % ahead: a day, week or month, and 0 or more ahead', coalesce(unit, 'null'), coalesce(ahead::text, 'null')
            using errcode = 'invalid_parameter_value';
    end if;
    select * into root from pg_class where oid = outbox;
    home := (select nspname from pg_namespace where oid = root.relnamespace);
    for i in 0 .. ahead loop
        since := date_trunc(unit, now()) + i * ('1 ' || unit)::interval;
        part := format('%s_p%s', root.relname, to_char(since, 'YYYYMMDD'));
        continue when to_regclass(format('%I.%I', home, part)) is not null;
        begin
            execute format('create table %I.%I partition of %s for values from (%L) to (%L) with (fillfactor = 50)',
                           home, part, outbox, since, since + ('1 ' || unit)::interval);
            return next format('%I.%I', home, part);
        exception
            when invalid_object_definition then
                raise notice '% is not made: another partition has some of its time', part;
            when check_violation then
                raise notice '% is not made: the default partition has rows of its time', part;
        end;
    end loop;
end;
$$ language plpgsql set lock_timeout = '1s' set timezone = 'UTC' set datestyle = 'ISO';
-- +goose StatementEnd

-- outbox_relay_drop_partitions drops the partitions of an outbox of this schema
-- whose time ended longer ago than older, and in which every row was published
-- longer ago than that, if there is any. The default partition stays, as does a
-- partition that is partitioned itself. It returns the names of what it dropped.
--
-- It works as who migrated, so that the relay need not own the table; only who is
-- granted EXECUTE may call it. What it takes for an outbox it is strict about: a
-- table of its own schema and owner, that is in a publication, and that has the
-- function outbox_retry, which migrating made. Only the owner of all can make a
-- table into one.
--
-- A partition is locked against changes while it is read, for which an UPDATE
-- through the root waits, unless the partition is pruned; an INSERT does not. The
-- root is locked at the end, and until the transaction ends: call it in a
-- transaction of its own. For no lock does it wait longer than 100 ms; what it
-- could not lock, it tells of in a notice and leaves to the next call.
-- +goose StatementBegin
do $do$
begin
execute replace($create$
create or replace function outbox_relay_drop_partitions(outbox regclass, older interval) returns setof text as $$
declare
    me     oid         := (select oid from pg_catalog.pg_roles where rolname = current_user);
    home   oid         := (select oid from pg_catalog.pg_namespace where nspname = <schema>);
    until  timestamptz := pg_catalog.now() - older;
    key    oid; -- the type of the partition key
    part   record;
    doomed text[];
    kept   boolean;
begin
    if older is null or older < interval '0' then
        raise exception 'cannot drop partitions older than %: an interval that is not negative is needed', coalesce(older::text, 'null')
            using errcode = 'invalid_parameter_value';
    end if;
    -- In a transaction with one snapshot for all, rows that came later would not be seen.
    if pg_catalog.current_setting('transaction_isolation') <> 'read committed' then
        raise exception 'partitions can be dropped at isolation level read committed only'
            using errcode = 'invalid_transaction_state', hint = 'Call outbox_relay_drop_partitions in a transaction of its own.';
    end if;
    if not exists (select
                   from pg_catalog.pg_class as c
                   join pg_catalog.pg_publication_rel as r on r.prrelid = c.oid
                   join pg_catalog.pg_proc as f on f.pronamespace = home and f.proowner = me
                       and f.proname = case when c.relname ~ '^events$' then 'outbox_retry' else 'outbox_retry_' || c.relname end
                   where c.oid = outbox and c.relnamespace = home and c.relowner = me)
    then
        raise exception 'table % is no outbox of % in schema %: its partitions are left alone', outbox, current_user, home::regnamespace
            using errcode = 'insufficient_privilege',
                  hint = 'It has to be migrated by outbox-relay, be in a publication, and be owned by who owns outbox_relay_drop_partitions.';
    end if;
    select a.atttypid into key
    from pg_catalog.pg_partitioned_table as p
    join pg_catalog.pg_attribute as a on a.attrelid = p.partrelid and a.attnum = p.partattrs[0]
    where p.partrelid = outbox and p.partstrat = 'r' and p.partnatts = 1
      and a.atttypid in ('timestamptz'::regtype, 'timestamp'::regtype, 'date'::regtype);
    if not found then
        raise exception 'table % is not partitioned by range of one timestamptz, timestamp or date column: its partitions are left alone', outbox
            using errcode = 'wrong_object_type';
    end if;

    for part in
        select c.oid, c.oid::regclass::text as name
        from pg_catalog.pg_inherits as i
        join pg_catalog.pg_class as c on c.oid = i.inhrelid,
        -- Null for the default partition and for MAXVALUE. A time without zone
        -- has passed when it has passed everywhere on earth.
        lateral (select substring(pg_catalog.pg_get_expr(c.relpartbound, c.oid) from 'TO [(]''([^'']*)''[)]$')::timestamptz
                            + case when key = 'timestamptz'::regtype then interval '0' else interval '12 hours' end as ends) as bound
        where i.inhparent = outbox and not i.inhdetachpending and c.relkind = 'r' and c.relowner = me and bound.ends <= until
        order by bound.ends
    loop
        begin
            -- At first without a lock: most that are not to be dropped show it early.
            for attempt in 1 .. 2 loop
                execute pg_catalog.format('select exists (select from only %s where status is distinct from ''published'''
                                          ' or published_at is null or published_at >= $1)', part.name) into kept using until;
                exit when kept;
                if attempt = 1 then
                    execute pg_catalog.format('lock table only %s in exclusive mode nowait', part.name);
                    -- Under its lock it can be another no more.
                    exit when not exists (select from pg_catalog.pg_inherits
                                          where inhrelid = part.oid and inhparent = outbox and part.oid::regclass::text = part.name);
                else
                    doomed := doomed || part.name;
                end if;
            end loop;
        exception when lock_not_available or undefined_table then
            raise notice 'partition % is in use: left to the next call', part.name;
        end;
    end loop;

    if doomed is null then
        return;
    end if;
    begin
        execute pg_catalog.format('lock table only %s in access exclusive mode', outbox);
    exception when lock_not_available or deadlock_detected then
        raise notice 'table % is in use: all is left to the next call', outbox;
        return;
    end;
    for part in select unnest(doomed) as name loop
        begin
            execute pg_catalog.format('lock table only %s in access exclusive mode nowait', part.name);
            execute pg_catalog.format('drop table %s', part.name);
            return next part.name;
        exception when lock_not_available or dependent_objects_still_exist then
            raise notice 'partition % is left: %', part.name, sqlerrm;
        end;
    end loop;
end;
$$ language plpgsql volatile security definer
    set search_path = pg_catalog, pg_temp
    set lock_timeout = '100ms'
    set row_security = off
    set timezone = 'UTC'
    set datestyle = 'ISO'
$create$, '<schema>', (select quote_literal(nspname)
                       from pg_class join pg_namespace on pg_namespace.oid = relnamespace
                       where pg_class.oid = 'events'::regclass));

revoke all on function outbox_relay_drop_partitions(regclass, interval) from public;
end;
$do$;
-- +goose StatementEnd
