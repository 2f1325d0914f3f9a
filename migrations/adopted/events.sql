-- The outbox is the application's own, such as Debezium's: Render puts this in the
-- place of the whole of 001. The application gives the ids. What the relay needs
-- besides is added, with defaults, so that no INSERT has to change; nothing is taken
-- away, and there is no trigger. A column with a constant default is added without
-- rewriting the table; created_at of the rows that are there is the time of this.
-- Only up; it can be run twice, and by psql alone.

-- +goose Up

-- +goose StatementBegin
do $do$
declare
    outbox  regclass := to_regclass('events');
    wanting text;
begin
    if outbox is null then
        raise exception 'table % does not exist', 'events'
            using errcode = 'undefined_table',
                  hint = 'OUTBOX_COLUMN_ variables are set, so it is the application that makes it: make it first, or unset them.';
    end if;
    select string_agg(format('%s (%s)', quote_ident(name), variable), ', ' order by variable) into wanting
    from (values <needed>) as needed (variable, name)
    where not exists (select from pg_attribute where attrelid = outbox and attname = name and attnum > 0 and not attisdropped);
    if wanting is not null then
        raise exception 'table % has no column %', outbox, wanting
            using errcode = 'object_not_in_prerequisite_state',
                  hint = 'Name the columns that the table has, and leave those variables unset that it has no column for.';
    end if;

    alter table events
        add column if not exists version          int default 0 not null,
        add column if not exists status           text default 'pending' not null,
        add column if not exists published_at     timestamptz null,
        add column if not exists failed_at        timestamptz null,
        add column if not exists failed_reasons   text[] null,
        add column if not exists failed_attempts  int default 0 not null,
        add column if not exists retried_at       timestamptz null,
        add column if not exists retried_attempts int default 0 not null,
        add column if not exists created_at       timestamptz default now() not null;

    if not exists (select
                   from pg_attribute as a join pg_attrdef as d on d.adrelid = a.attrelid and d.adnum = a.attnum
                   where a.attrelid = outbox and a.attname = 'status' and pg_get_expr(d.adbin, d.adrelid) like '''pending''%')
    then
        raise exception 'table % has a column status of its own, whose default is not pending', outbox
            using errcode = 'object_not_in_prerequisite_state',
                  hint = 'The relay says there what became of an event: pending, published or failed. Give the application''s column another name.';
    end if;

    -- All that looks for a row does so by the text of its id. That it is unique tells
    -- the planner, before there are statistics, that it finds one row.
    if not exists (select
                   from pg_index as i
                   join pg_attribute as a on a.attrelid = i.indrelid and a.attnum = i.indkey[0]
                   join pg_class as c on c.oid = i.indexrelid
                   join pg_am as m on m.oid = c.relam
                   where i.indrelid = outbox and a.attname = <id> and a.atttypid in ('text'::regtype, 'varchar'::regtype)
                     and m.amname = 'btree' and i.indpred is null and i.indisvalid)
    then
        -- Building it holds writers up for as long as the table takes to be read: where
        -- that is too long, make it beforehand with CREATE UNIQUE INDEX CONCURRENTLY
        -- under this name.
        if (select relkind from pg_class where oid = outbox) = 'p' then
            create index if not exists events_id_text_index on events ((events.id::text));
        else
            create unique index if not exists events_id_text_index on events ((events.id::text));
        end if;
        analyze events;
    end if;
end;
$do$;
-- +goose StatementEnd
