-- Requests prove themselves. A retry or a replay is a logical message, which carries no
-- role, and anybody who may connect can write one: from here on the relay takes only
-- those that outbox_relay_ask has signed, which only roles with EXECUTE on it can call.
-- Only up; it can be run twice, and by psql alone.

-- +goose Up

-- The secret is known to outbox_relay_ask and to the relay. It is the default of a column
-- that is added to the row, so the table is rewritten, which logical decoding does not
-- show: no publication of all tables carries it elsewhere. Requests that were committed
-- before since are taken without a signature: a release before this one wrote them.
--
-- outbox_relay_ask asks the relay of an outbox for rows, by a transactional logical message
-- that has the signature of the secret, the message's prefix, this transaction and the
-- request. The request is {"retry": [{"id": ..., "attempt": ...}, ...]} or {"replay": run,
-- "ids": [id, ...]}. It returns the LSN of the message.
--
-- Default privileges may give new tables and functions away: that is taken back. Roles that
-- could retry before may ask, and those of relays may read the secret.
-- +goose StatementBegin
do $do$
declare
    home    name := (select nspname from pg_namespace join pg_class on relnamespace = pg_namespace.oid
                     where pg_class.oid = 'events'::regclass);
    ask     text := format('%I.outbox_relay_ask(regclass, text)', home);
    first   boolean := to_regprocedure(ask) is null;
    granted text;
begin
    create table if not exists outbox_relay_secret
    (
        since timestamptz not null
    );
    insert into outbox_relay_secret (since)
    select case when exists (select from outbox_relay_checkpoints) then now() + interval '1 minute' else to_timestamp(0) end
    where not exists (select from outbox_relay_secret);
    alter table outbox_relay_secret
        add column if not exists secret bytea not null
            default sha256(convert_to(gen_random_uuid()::text || gen_random_uuid()::text, 'UTF8'));

    execute replace($create$
create or replace function <schema>.outbox_relay_ask(outbox regclass, request text) returns pg_lsn as $$
    select pg_catalog.pg_logical_emit_message(true, prefix, pg_catalog.encode(pg_catalog.sha256(
               secret || pg_catalog.sha256(secret || pg_catalog.convert_to(
                   prefix || ' ' || pg_catalog.pg_current_xact_id()::xid::text || ' ' || request, pg_catalog.getdatabaseencoding()))),
               'hex') || ' ' || request)
    from <schema>.outbox_relay_secret, pg_catalog.concat('outbox_relay:', outbox::oid) as prefix
$$ language sql volatile strict security definer set search_path = pg_catalog, pg_temp
$create$, '<schema>', quote_ident(home));

    if first then
        for granted in
            select format('revoke all on outbox_relay_secret from %s', case grantee when 0 then 'public' else grantee::regrole::text end)
            from pg_class, aclexplode(relacl)
            where pg_class.oid = 'outbox_relay_secret'::regclass and grantee <> relowner
            union all
            select format('revoke all on function %s from %s', ask, case grantee when 0 then 'public' else grantee::regrole::text end)
            from pg_proc, aclexplode(coalesce(proacl, acldefault('f', proowner)))
            where pg_proc.oid = ask::regprocedure and grantee <> proowner
        loop
            execute granted;
        end loop;
    end if;
    for granted in
        select distinct format('grant select on outbox_relay_secret to %s', grantee::regrole)
        from pg_class, aclexplode(relacl)
        where pg_class.oid = 'outbox_relay_checkpoints'::regclass and privilege_type = 'UPDATE' and grantee not in (0, relowner)
        union all
        select distinct format('grant execute on function %s to %s', ask, grantee::regrole)
        from pg_class
        join pg_attribute on attrelid = pg_class.oid and attname = 'retried_attempts',
            lateral (select * from aclexplode(relacl) union all select * from aclexplode(attacl)) as of_either
        where pg_class.oid = 'events'::regclass and privilege_type = 'UPDATE' and grantee not in (0, relowner)
    loop
        execute granted;
    end loop;
end;
$do$;
-- +goose StatementEnd

-- outbox_retry puts failed rows back to pending and asks the relay, by requests of at
-- most 1000 rows each, to publish them once this transaction has committed. It returns
-- how many: what is not failed, or not there, is passed over. failed_at and
-- failed_reasons stay as they are, to tell what happened. All but the asking is as in 007.
--
-- It works as the caller, who needs SELECT and UPDATE (status, retried_at,
-- retried_attempts) on the table, and EXECUTE on outbox_relay_ask. It finds both in the
-- schema that they have now, whatever the caller's search_path, and the table under its
-- name, so that it can be replaced by another. Rows are locked in the order of their ids:
-- two of them never deadlock.
--
-- An array of ids is looked up in the index whatever the planner believes of the
-- sizes, and the statement is planned for the bounds of created_at that it gets. In a
-- table that is partitioned by it, ids that are ULIDs, or UUIDs of version 7, are taken
-- by the day that they tell, and looked for in the partitions of that time: a row is
-- made at most a day after its transaction began, which created_at says. Any other id,
-- and one that has no failed row there, is looked for in all partitions.
-- +goose StatementBegin
do $do$
begin
perform set_config('search_path', format('%I, pg_temp', nspname), true)
from pg_class join pg_namespace on pg_namespace.oid = relnamespace
where pg_class.oid = 'events'::regclass;

create or replace function outbox_retry(variadic ids text[]) returns bigint as $$
declare
    by_time boolean := exists (select
                               from pg_partitioned_table as p
                               join pg_attribute as a on a.attrelid = p.partrelid and a.attnum = p.partattrs[0]
                               where p.partrelid = 'events'::regclass and p.partstrat = 'r' and p.partnatts = 1
                                 and a.atttypid = 'timestamptz'::regtype);
    part    record;
    found   text[];
    missing text[] := '{}';
    total   bigint := 0;
begin
    loop
        for part in
            select array_agg(distinct listed.id) as ids, day is not null as bounded,
                   coalesce(day - interval '1 day', '-infinity') as since, coalesce(day + interval '25 hours', 'infinity') as until
            from unnest(ids) as listed (id),
                lateral (select case
                    when not by_time then null
                    when right(listed.id, 26) ~ '^[0-7][0-9A-HJKMNP-TV-Z]{25}$' then
                        (select sum((strpos('0123456789ABCDEFGHJKMNPQRSTVWXYZ', substr(right(listed.id, 26), n, 1)) - 1)::bigint << (5 * (10 - n)))
                         from generate_series(1, 10) as n)
                    when listed.id ~ '^[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}$' then
                        ('x' || lpad(substr(listed.id, 1, 8) || substr(listed.id, 10, 4), 16, '0'))::bit(64)::bigint
                    end as ms) as made,
                lateral (select date_trunc('day', to_timestamp(ms / 1000.0), 'UTC') as day) as of
            group by day
            order by day
        loop
            with failed as materialized (
                select events.id::text as id
                from events
                where events.id::text = any (part.ids) and status = 'failed'
                  and events.created_at >= part.since and events.created_at < part.until
                order by events.id
                for no key update
            ), retried as (
                update events
                set status = 'pending', retried_at = now(), retried_attempts = retried_attempts + 1
                where events.id::text = any (array(select id from failed)) and status = 'failed'
                  and events.created_at >= part.since and events.created_at < part.until
                returning events.id as place, events.id::text as id, retried_attempts
            ), numbered as (
                select place, id, retried_attempts as attempt, (row_number() over (order by place) - 1) / 1000 as message
                from retried
            ), emitted as materialized (
                select outbox_relay_ask('events'::regclass, json_build_object(
                           'retry', json_agg(json_build_object('id', id, 'attempt', attempt) order by place))::text) as lsn
                from numbered
                group by message
                order by message
            )
            select array(select id from retried) into found
            where (select count(lsn) from emitted) >= 0; -- reads lsn, so that it is emitted
            total := total + cardinality(found);
            if part.bounded then
                missing := missing || array(select unnest(part.ids) except select unnest(found));
            end if;
        end loop;
        exit when missing = '{}';
        ids := missing;
        missing := '{}';
        by_time := false;
    end loop;
    return total;
end;
$$ language plpgsql volatile set search_path from current
    set plan_cache_mode = force_custom_plan set enable_seqscan = off set jit = off;
end;
$do$;
-- +goose StatementEnd
