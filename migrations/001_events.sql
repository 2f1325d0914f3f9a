-- The outbox: the table events, the trigger that fills in what an application
-- must not choose, and gen_random_ulid(), which makes the ids.
-- Only up; it can be run twice, and by psql alone.

-- +goose Up

-- gen_random_ulid() returns a ULID: 26 characters of Crockford's base 32, the
-- first 10 of them the milliseconds since 1970. In one session each is greater
-- than those before it. It needs nothing but pg_catalog, whatever search_path
-- the session has.
--
-- A character is looked up with get_byte, which is O(1) where substr on a text
-- is not: less than half the time of a loop over substr.

-- +goose StatementBegin
do $do$
begin
if current_setting('server_version_num')::int >= 180000 then

-- The 128 bits of a UUID of version 7 are a ULID too: the milliseconds, 12 bits
-- of their fraction, 62 random bits. Postgres never gives a session the same
-- time twice, nor an earlier one, even when the clock is set back.
create or replace function gen_random_ulid() returns text as $ulid$
declare
    c    constant bytea  := '0123456789ABCDEFGHJKMNPQRSTVWXYZ';
    uuid constant bytea  := uuid_send(uuidv7());
    head constant bigint := substring(uuid, 1, 8)::bigint;
    tail constant bigint := substring(uuid, 9, 8)::bigint;
begin
    return encode(
           int4send((get_byte(c, (head >> 61 & 7)::int) << 24) | (get_byte(c, (head >> 56 & 31)::int) << 16)
            | (get_byte(c, (head >> 51 & 31)::int) << 8) | get_byte(c, (head >> 46 & 31)::int))
        || int4send((get_byte(c, (head >> 41 & 31)::int) << 24) | (get_byte(c, (head >> 36 & 31)::int) << 16)
            | (get_byte(c, (head >> 31 & 31)::int) << 8) | get_byte(c, (head >> 26 & 31)::int))
        || int4send((get_byte(c, (head >> 21 & 31)::int) << 24) | (get_byte(c, (head >> 16 & 31)::int) << 16)
            | (get_byte(c, (head >> 11 & 31)::int) << 8) | get_byte(c, (head >> 6 & 31)::int))
        || int4send((get_byte(c, (head >> 1 & 31)::int) << 24) | (get_byte(c, ((head & 1) << 4 | (tail >> 60 & 15))::int) << 16)
            | (get_byte(c, (tail >> 55 & 31)::int) << 8) | get_byte(c, (tail >> 50 & 31)::int))
        || int4send((get_byte(c, (tail >> 45 & 31)::int) << 24) | (get_byte(c, (tail >> 40 & 31)::int) << 16)
            | (get_byte(c, (tail >> 35 & 31)::int) << 8) | get_byte(c, (tail >> 30 & 31)::int))
        || int4send((get_byte(c, (tail >> 25 & 31)::int) << 24) | (get_byte(c, (tail >> 20 & 31)::int) << 16)
            | (get_byte(c, (tail >> 15 & 31)::int) << 8) | get_byte(c, (tail >> 10 & 31)::int))
        || int2send(((get_byte(c, (tail >> 5 & 31)::int) << 8) | get_byte(c, (tail & 31)::int))::int2), 'escape');
end;
$ulid$ language plpgsql volatile;

else

-- The milliseconds, the microseconds in the first 10 of the 80 random bits, and
-- 70 bits from a random UUID. It waits for the next microsecond before it
-- returns (the work above mostly takes longer), so the next call reads a later
-- time, unless the server's clock is set back.
create or replace function gen_random_ulid() returns text as $ulid$
declare
    c    constant bytea       := '0123456789ABCDEFGHJKMNPQRSTVWXYZ';
    at   constant timestamptz := clock_timestamp();
    us   constant bigint      := date_part('epoch', at) * 1000000; -- exact until 2106
    uuid constant uuid        := gen_random_uuid();
    head constant bigint      := (us / 1000 << 10) | us % 1000;
    tail constant bigint      := uuid_hash_extended(uuid, 0);
    rest constant bigint      := uuid_hash_extended(uuid, 1);
    ulid constant text        := encode(
           int4send((get_byte(c, (head >> 55 & 31)::int) << 24) | (get_byte(c, (head >> 50 & 31)::int) << 16)
            | (get_byte(c, (head >> 45 & 31)::int) << 8) | get_byte(c, (head >> 40 & 31)::int))
        || int4send((get_byte(c, (head >> 35 & 31)::int) << 24) | (get_byte(c, (head >> 30 & 31)::int) << 16)
            | (get_byte(c, (head >> 25 & 31)::int) << 8) | get_byte(c, (head >> 20 & 31)::int))
        || int4send((get_byte(c, (head >> 15 & 31)::int) << 24) | (get_byte(c, (head >> 10 & 31)::int) << 16)
            | (get_byte(c, (head >> 5 & 31)::int) << 8) | get_byte(c, (head & 31)::int))
        || int4send((get_byte(c, (tail >> 55 & 31)::int) << 24) | (get_byte(c, (tail >> 50 & 31)::int) << 16)
            | (get_byte(c, (tail >> 45 & 31)::int) << 8) | get_byte(c, (tail >> 40 & 31)::int))
        || int4send((get_byte(c, (tail >> 35 & 31)::int) << 24) | (get_byte(c, (tail >> 30 & 31)::int) << 16)
            | (get_byte(c, (tail >> 25 & 31)::int) << 8) | get_byte(c, (tail >> 20 & 31)::int))
        || int4send((get_byte(c, (tail >> 15 & 31)::int) << 24) | (get_byte(c, (tail >> 10 & 31)::int) << 16)
            | (get_byte(c, (tail >> 5 & 31)::int) << 8) | get_byte(c, (tail & 31)::int))
        || int2send(((get_byte(c, (rest >> 5 & 31)::int) << 8) | get_byte(c, (rest & 31)::int))::int2), 'escape');
begin
    loop
        exit when clock_timestamp() <> at;
    end loop;
    return ulid;
end;
$ulid$ language plpgsql volatile;

end if;
end;
$do$;
-- +goose StatementEnd

-- +goose StatementBegin
create or replace function on_events_create() returns trigger as $$
begin
    new.id = 'event_' || gen_random_ulid(); -- gen_random_uuid() or gen_random_ulid()
    new.version = 0;
    new.status = 'pending';
    new.published_at = null;
    new.failed_at = null;
    new.failed_reasons = null;
    new.failed_attempts = 0;
    new.retried_at = null;
    new.retried_attempts = 0;
    new.created_at = now();
    return new;
end;
$$ language plpgsql;

create table if not exists events
(
    id               text          not null,
    version          int default 0 not null,
    aggregate_type   text          not null,
    event_type       text          not null,
    payload          jsonb         not null,
    status           text          not null,
    published_at     timestamptz   null,
    failed_at        timestamptz   null,
    failed_reasons   text[]        null,
    failed_attempts  int default 0 not null,
    retried_at       timestamptz   null,
    retried_attempts int default 0 not null,
    created_at       timestamptz   not null,
    constraint events_id_primary_key primary key (id),
    constraint events_id_version_unique unique (id, version),
    constraint events_id_check check ( trim(id) <> '' ),
    constraint events_version_check check ( version >= 0 ),
    constraint events_aggregate_type_check check ( trim(aggregate_type) <> '' ),
    constraint events_event_type_check check ( trim(event_type) <> '' ),
    constraint events_status_check check ( status in ('pending', 'published', 'failed') )
);

create or replace trigger on_events_create before insert on events
    for each row execute function on_events_create();
-- +goose StatementEnd
